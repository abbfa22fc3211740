"""Everything normtool raises on purpose.

NormtoolError                 70  a bug of ours, if nothing more exact is raised
├── UsageError                 2  the call itself is off
├── UnreadableModel            3  the file is broken, or not a model
│   ├── UnsafeModel            3  reading on would leave the model's folder, or a stated bound
│   └── RuntimeRefused         3  ONNX Runtime refuses, crashes on or outlives its time on the model
├── BackendUnavailable         4  a device or a library that was asked for is not there
├── OutputError                5  the result cannot be put where it was asked for
└── StalePlan                  2  a plan made for another model, or for an earlier state of this one

The number is the process exit code (DESIGN §6). A message says what, where, and what to do next,
in one or two lines.
"""


class NormtoolError(Exception):
    exit_code = 70


class UsageError(NormtoolError):
    exit_code = 2


class UnreadableModel(NormtoolError):
    exit_code = 3


class UnsafeModel(UnreadableModel):
    pass


class RuntimeRefused(UnreadableModel):
    pass


class BackendUnavailable(NormtoolError):
    exit_code = 4


class OutputError(NormtoolError):
    exit_code = 5


class StalePlan(NormtoolError):
    exit_code = 2
