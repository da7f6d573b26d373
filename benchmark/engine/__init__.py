"""The engine: suite, plan, store, workers, results. Knows no method by name and imports torch only in workers."""
