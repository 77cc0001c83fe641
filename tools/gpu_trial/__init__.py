"""Try the tier on a GPU machine without network access; see docs/gpu-trial.md.

`tools/gpu-trial pack FOLDER` writes everything the trial needs into archives of at most 64 MiB.
`memkv-trial/run RESULT.json` runs it there, with Python 3.12 and torch. SGLang's servers need
kernels and a newer torch, so the trial uses SGLang's host pools without them.
"""
