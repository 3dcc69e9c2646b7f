"""The cost model of the FlexGen paper (Sheng et al., ICML 2023, section 4.3 and appendix A.3) and its search, beside our own.

It prices a zigzag block of OPT: the seconds of one layer per resource, the peak bytes of every tier, tokens per second.
Nothing in the engine asks it; docs/paper_model.md compares its figures with what was measured.

The paper's letters: l layers, h1 hidden size, h2 MLP size, nh heads; s prompt tokens, n generated tokens; gbs sequences of
a GPU batch, bls sequences of a block; w, c, h the weights, KV cache and hidden states, each divided over g, c, d (device,
host, disk).  ctog is our host_to_device, gtoc device_to_host, dtoc disk_read, ctod disk_write, comp compute.
"""
