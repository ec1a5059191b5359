"""`gradscope.Monitor` as a callback of training frameworks; each module needs the pip extra of the same name."""
