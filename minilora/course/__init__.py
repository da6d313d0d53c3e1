"""A graded course: students write the backward passes and are told what is wrong with them.

The engine (`exercises`, `skeleton`, `cases`, `check`, `mistakes`, `edits`, `puzzles`) starts no process and no thread
and needs NumPy alone, so it also runs inside a browser; `runner` and `results` are for a folder of files.
"""
