"""One run and a sweep of runs: names, locks, what became of them, and the processes that run them."""
