"""The tests check every shape and type that `implicit` declares, at run time; benchmarks and users do not."""

import jaxtyping

jaxtyping.install_import_hook("implicit", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
