"""A model on several machines: which decoder layers each computes, as a stage of a pipeline, and what is expected of the whole."""
