"""The C++ operators of a CPU, and what the process sets before torch loads."""
