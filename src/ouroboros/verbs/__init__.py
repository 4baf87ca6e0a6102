"""The verbs of the command line: each parses its options, calls the library and prints.

Results go to standard output (one JSON object with ``--json``), progress and logs to standard error.
"""
