"""The verbs of the command line: each parses its options, calls the library and prints.

Results go to standard output (one JSON object with ``--json``), progress and logs to standard error.
"""

VERBS = {
    "demo": ("demo", "train a looped model and its plain twin on bundled text; writes report.html"),
    "recipes": ("show", "list the recipes"),
    "show": ("show", "draw a recipe's schedule and its exact costs"),
    "train": ("train", "train a recipe on your text"),
    "resume": ("train", "continue an interrupted run, bit for bit"),
    "tokenizer": ("tokenizer", "train a byte-level BPE tokenizer"),
    "eval": ("evaluate", "score a model in bits per byte"),
    "check": ("check", "run the correctness harness and the audit on a model or recipe"),
    "generate": ("talk", "continue a prompt"),
    "chat": ("talk", "talk to a model"),
    "serve": ("serve", "answer over HTTP: OpenAI's interface, and a page to talk to the model"),
    "convert": ("convert", "make a model directory of a pretrained model or a published checkpoint"),
    "pack": ("pack", "write a model as one small file, within a budget of bytes"),
    "inspect": ("inspect", "list what a packed file holds"),
    "compare": ("compare", "train a recipe and its plain twins, and say which is better"),
    "export": ("export", "write a model in the form of another library"),
    "ablate": ("ablate", "run a study: what each of several changes to a recipe brings"),
    "report": ("report", "write a page about a run, a study or a comparison"),
    "doctor": ("doctor", "say what this machine and its installation can do, and what is missing"),
    "completion": ("completion", "print a script that lets a shell complete verbs and options"),
}
"""Verb: module in ``ouroboros.verbs`` and summary. The module has a function of the verb's name."""
