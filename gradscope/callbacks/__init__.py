"""`gradscope.Monitor` as a callback of training frameworks; each module needs its own extra."""
