"""What to expect of a base nobody has edited yet: is it supported, at which layer, how well, at what cost.

`examine` tries it: it looks at several layers, learns a few probe edits where the gate does best, and says in words
what came of it, with a config for the edits to follow. It writes nothing and changes nothing about the base.
"""

from __future__ import annotations

from wisecli.doctor.examination import DoctorOptions, examine
from wisecli.doctor.report import Candidate, DoctorReport, Figure, Learned, Verdict

__all__ = ["Candidate", "DoctorOptions", "DoctorReport", "Figure", "Learned", "Verdict", "examine"]
