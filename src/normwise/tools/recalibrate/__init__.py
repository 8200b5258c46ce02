"""``normwise.recalibrate()``: running statistics that drifted become those of the data, exactly.

One file a job: which layers (layers), batches and calls (feed), hooks (collect), a pass over the
data (passes), what passes are run (modes), all or nothing (transaction), going on after a kill
(checkpoint), several processes (ranks), what came of it (metric, report, progress).
"""

from normwise.tools.recalibrate.main import recalibrate
from normwise.tools.recalibrate.report import RecalibrationReport, RecalibrationResult

__all__ = ["RecalibrationReport", "RecalibrationResult", "recalibrate"]
