"""Built-in attacks, one file each."""

if __name__ != "sleeperbench.attacks":
    raise ImportError("import sleeperbench.attacks, not attacks")
