"""Parts of `benchmarks.interrupts`: what is measured, what must be as before, and how a measurement is interrupted."""
