"""A fuzzer of the command line: damaged files, odd data and odd flags end in a result or in one line."""
