"""`gradscope.Monitor` as a callback of training frameworks; each module imports its framework, an extra of its own."""
