"""Training: the loop over steps, runs in a folder, their checkpoints, and several processes.

`loop` trains one tree, `runs` starts or resumes a run and writes its result, `checkpoint` saves its
state, `ranks` shares it among processes under MPI, and `progress` shows how far it is.
"""
