"""Where answers are kept: in this process's memory, in a file that processes share, in a Redis that hosts share."""
