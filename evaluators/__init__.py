"""Built-in evaluators, one file per metric family."""

if __name__ != "sleeperbench.evaluators":
    raise ImportError("import sleeperbench.evaluators, not evaluators")
