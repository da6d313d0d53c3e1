"""Training: the loop over steps, runs in a folder, their checkpoints, and several processes.

`loop` trains one tree, `runs` starts or resumes a run and writes what it gives, `checkpoint` saves
its state, and `ranks` shares it among processes under MPI.
"""
