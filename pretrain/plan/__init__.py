"""What a run will need before it is started: floating-point operations, memory of a GPU, time, money, input."""
