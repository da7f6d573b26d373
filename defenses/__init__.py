"""Built-in defenses, one file each."""

if __name__ != "sleeperbench.defenses":
    raise ImportError("import sleeperbench.defenses, not defenses")
