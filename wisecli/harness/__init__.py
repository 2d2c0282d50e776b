"""General ability after editing, on the tasks of EleutherAI's lm-evaluation-harness (the optional package `lm_eval`).

`run_harness` asks a base alone and then with its side memory. `WiseLM` is the model it asks, and can be handed to
lm_eval itself: `lm_eval --model wise --model_args pretrained=BASE,side_memory=FILE --tasks ...` where lm_eval finds
installed models, `python -m wisecli.harness` with the same arguments where it does not. Importing this package makes
`wise` known to lm_eval; without lm_eval it can still be imported, and says what is missing when it is used.
"""

from wisecli.harness.lm import WiseLM
from wisecli.harness.run import check_tasks, run_harness

__all__ = ["WiseLM", "check_tasks", "run_harness"]
