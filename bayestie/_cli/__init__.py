"""The parts of the command line that need heavy libraries: loaded inside the commands."""
