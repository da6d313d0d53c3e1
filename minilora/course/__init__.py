"""A graded course: students write the backward passes and are told what is wrong with them.

The engine (`exercises`, `puzzles`, `cases`, `check`, `diagnosis`, `edits`, `mistakes`) starts no
process and no thread and needs NumPy alone, so it also runs inside a browser; `skeleton`, `runner`
and `results` are for a folder of files.
"""
