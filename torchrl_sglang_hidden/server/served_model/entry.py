"""Gives SGLang the class of the model that it serves: ``EntryClass``, which SGLang reads of a module with models.

SGLang imports every file of ``sglang.srt.models`` to find one class: five seconds on a CPU. Imported by SGLang's
registry of models, in its scheduler, where `offer_model` named this package. What is not found here SGLang looks for as
before.
"""

from __future__ import annotations

import os

from torchrl_sglang_hidden.server.model_files import ARCHITECTURE_ENV, classes_of

EntryClass = classes_of(os.environ.get(ARCHITECTURE_ENV, ""))
