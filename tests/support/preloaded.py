"""What the server of ``processes`` imports, so that no process has to."""

from importlib import import_module
from importlib.util import find_spec

MODULES = (
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "transformers.trainer",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "transformers.models.llama.modeling_llama",
    "datasets",
    "funcattrib.cli.build",
    "funcattrib.cli.load",
    "funcattrib.recipes.less",
    "funcattrib.recipes.trackstar",
    "funcattrib.recipes.trak",
    "tests.support.processes",
    "tests.support.saved_runs",
    "tests.support.sharded_run",
    "tests.support.store_run",
)

for module in (*MODULES, *filter(find_spec, ("accelerate", "bitsandbytes"))):
    import_module(module)
