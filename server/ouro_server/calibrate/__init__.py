"""`ouro-serve calibrate`: the lowest threshold that keeps a promise on questions of one's own.

`command.py` goes from a command line (`plan.py`) and a file (`questions.py`) to what is written
(`report.py`, `plot.py`, `presets.py`). `run.py` has an engine (`engine.py`) answer and keeps what
it found (`state.py`); `bounds.py` and `choose.py` are the statistics.
"""
