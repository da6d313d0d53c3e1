"""A graded course: students write the backward passes and are told what is wrong with them.

The engine (`exercises`, `puzzles`, `cases`, `check`, `diagnosis`, `edits`, `mistakes`) starts no
process and no thread and needs NumPy alone, so it also runs inside a browser: `check.graded` takes
the text of a student's file and returns the result as data. `skeleton`, `runner` and `results` are
for a folder of files.
"""
