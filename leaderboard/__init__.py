"""Result tables in, static site out; never imports torch."""

if __name__ != "sleeperbench.leaderboard":
    raise ImportError("import sleeperbench.leaderboard, not leaderboard")
