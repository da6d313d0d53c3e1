"""`minilora bench` and `minilora budget`: what a step costs, measured and by formula.

`case` says what is timed, `measure` times it in a process of its own, `products` finds and repeats
its matrix products, `profile` divides the time among the operations, `peft` runs the same in
PyTorch, and `command` runs the processes and prints their figures. `budget` holds the formulas.
"""
