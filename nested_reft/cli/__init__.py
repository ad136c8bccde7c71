"""The command line: `main` finds the command, and every command has a file of its own."""
