"""The parts of the benchmark tool: what is timed, by whom, against which numbers and floors, and how it is told."""
