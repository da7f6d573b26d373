"""What papers printed, as data: figures with their settings, and claims that `compare-paper` holds against a run."""
