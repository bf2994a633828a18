"""Audits: a share of the answers that skipped loops is read once more at full depth, when nobody
waits.

A request is picked as it comes (`pick.py`) and its tokens are noted on the way to the client
(`tap.py`); when it has ended it waits in a bounded queue until there is room (`auditor.py`) for one
pass over prompt and answer, whose verdict (`verdict.py`) goes to the metrics (`metrics.py`) and to
the rule that holds a target agreement (`agreement.py`).
"""
