"""Run SGLang 0.5.23 with HiCache on a plain CPU.

The package has an out-of-tree platform with its hooks (`plugin`), a tiny model with random weights
(`tiny_model`), and helpers that start and stop servers (`server`, `router`). It does nothing on
machines with an accelerator.

The helpers need only the standard library, so they can run an SGLang that is installed in another
environment.
"""
