"""What the exit codes of every command mean. Scripts that restart runs go by them.

A run that ended with `PREEMPTED` or `STALLED`, or by a signal, goes on with `--resume`; so restart those. One that
ended with `FAILED` or `BAD_INPUT` would end the same way again.
"""

DONE = 0
FAILED = 1  # a check failed, an update was not finite, a file could not be written
BAD_INPUT = 2  # refused before any work
PREEMPTED = 75  # SIGTERM, as a machine that is taken away sends it; the name in `sysexits.h` is "try again"
STALLED = 76  # nothing went on for too long
INTERRUPTED = 130  # SIGINT or SIGHUP, as a shell reports a program that SIGINT ended
BROKEN_PIPE = 141  # whoever read the output went away, as a shell reports a program that SIGPIPE ended
