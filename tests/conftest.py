"""What every test relies on: no network, one thread, no progress bars, no windows, repeatable hypothesis examples."""

import os
import tempfile

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    MPLBACKEND="Agg",
    THRESHER_CACHE=tempfile.mkdtemp(prefix="thresher-tests-"),
    TOKENIZERS_PARALLELISM="false",
)

# After the environment: these read it when they are imported.
import hypothesis
import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
hypothesis.settings.load_profile("ci")  # no deadline, no database, repeatable
