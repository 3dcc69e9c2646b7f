"""What Triton compiles: functions on tiles, and the kernels made of them.  Their arguments have the types that launches give them."""
