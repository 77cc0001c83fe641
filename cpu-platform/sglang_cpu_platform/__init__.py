"""Run SGLang 0.5.23 with HiCache on a plain CPU.

An out-of-tree platform and the hooks that go with it (`plugin`), a tiny model made on the
spot (`tiny_model`), and what demos and tests need to start and stop servers (`server`,
`router`). Inert where an accelerator is present.

The helpers need only the standard library: they also drive an SGLang that is installed in
another environment than the one they run in.
"""
