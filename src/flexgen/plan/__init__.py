"""What will happen, as numbers: models, machines, workloads, policies and their price.  No torch."""
