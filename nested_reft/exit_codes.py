"""How a command ends, as a number that scripts and schedulers read.

A restart loop starts again after `MAY_PASS`, after `STALLED` and after a signal. It never does after `FAILED` or
`BAD_INPUT`, which would only come again.
"""

DONE = 0
FAILED = 1  # a check or an update failed, or something could not be written
BAD_INPUT = 2  # refused before training
MAY_PASS = 75  # EX_TEMPFAIL of sysexits.h, try again later: such as a process of the run that did not come in time
PREEMPTED = MAY_PASS  # by SIGTERM; the same command with --resume goes on
STALLED = 76  # nothing went on for `train.stall_seconds`
INTERRUPTED = 130  # by SIGINT or SIGHUP, as a shell reports a program that SIGINT ended
BROKEN_PIPE = 141  # whoever read the output went away, as a shell reports a program that SIGPIPE ended


class LateError(TimeoutError):
    """Another process of the run did not come in time. It may come when all are started again: `MAY_PASS`."""
