"""The command line: words and options become one function call."""
