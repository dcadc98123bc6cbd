"""Start vLLM on one model after another and print what it computes.

``python -m tests.helpers.engine_script JOBS``, where JOBS is a JSON array of

    {"model": directory,
     "options": keywords of LLM,
     "prompts": lists of token ids,
     "max_tokens": n,
     "reload": directory of a checkpoint whose weights take the place of the first ones,
     "regex": what every answer must match,
     "lora": directory of an adapter,
     "classes": of a draft model that config.json does not name,
     "logprobs": false where the engine cannot give them}

All but "model" and "prompts" may be left out. The last line on stdout is a JSON array of

    {"logprobs": of every prompt, those of every token after the first,
     "tokens": of every prompt, the greedy continuation,
     "graphs": number of graphs that torch.compile made in this process,
     "graph_breaks": number of its graph breaks,
     "accepted": number of drafted tokens that were taken, where "disable_log_stats" is false}

or, where the engine refused to start, {"error": message}. Every engine runs in a process of its
own, so that none of its state reaches the next one. It is forked from this process, which has
already done the imports: they take longer than everything else.
"""

import gc
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tools.attack.isolated import run_isolated

SECONDS = 1200  # that a job may take, on a slow machine
OPTIONS = {
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 4,
    "disable_log_stats": True,
}


def import_engine() -> None:
    """Import vLLM, before processes for its engines are forked.

    The imported objects are hidden from the garbage collector: an engine calls it nine times, and
    it would look through all of them every time.
    """
    import vllm.entrypoints.llm
    import vllm.model_executor.models
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    gc.collect()
    gc.freeze()


def sampling_parameters(job: dict[str, Any]) -> Any:
    """Greedy, with or without the log-probabilities of the prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    structure = StructuredOutputsParams(regex=job["regex"]) if "regex" in job else None
    return SamplingParams(
        temperature=0,
        max_tokens=job.get("max_tokens", 8),
        prompt_logprobs=0 if job.get("logprobs", True) else None,
        ignore_eos=structure is None,
        structured_outputs=structure,
    )


def prompt_logprobs(prompt: list[int], output: Any) -> list[float]:
    """Log-probability of every token of a prompt after the first."""
    return [
        entry[token].logprob
        for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    ]


def accepted_drafts(llm: Any) -> int:
    """How many drafted tokens this engine has accepted."""
    name = "vllm:spec_decode_num_accepted_tokens"
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


def import_model_classes(job: dict[str, Any]) -> None:
    """Import the classes of a job's model."""
    config = json.loads((Path(job["model"]) / "config.json").read_text())
    for architecture in [*config["architectures"], *job.get("classes", [])]:
        import_model_class(architecture)


def import_model_class(architecture: str) -> None:
    """Import a model class here: vLLM would inspect it in a new process, which takes long.

    An architecture that vLLM's registry does not list is not imported here.
    """
    from vllm import ModelRegistry

    if architecture in ModelRegistry.models:
        model_class = ModelRegistry.models[architecture].load_model_cls()
        ModelRegistry.register_model(architecture, model_class)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Start the engine for one job; it ends with the process."""
    from torch._dynamo.utils import counters
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    import_model_classes(job)
    counters.clear()
    llm = LLM(model=job["model"], **{**OPTIONS, **job.get("options", {})})
    if "reload" in job:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
        sampling_parameters(job),
        use_tqdm=False,
        lora_request=LoRARequest("adapter", 1, job["lora"]) if "lora" in job else None,
    )
    logprobs = None
    if job.get("logprobs", True):
        logprobs = [prompt_logprobs(p, out) for p, out in zip(job["prompts"], outputs, strict=True)]
    options = job.get("options", {})
    counted = not options.get("disable_log_stats", True)
    result = {
        "accepted": accepted_drafts(llm) if counted else None,
        "logprobs": logprobs,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    if options.get("distributed_executor_backend") == "mp":
        llm.llm_engine.engine_core.shutdown()  # else its other processes outlive this one
    return result


def results_of(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The one result of a job."""
    try:
        yield run(job)
    except Exception as error:  # the test judges it
        yield {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    import_engine()
    jobs = json.loads(sys.argv[1])
    results = [result for job in jobs for result in run_isolated(partial(results_of, job), SECONDS)]
    print(json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
