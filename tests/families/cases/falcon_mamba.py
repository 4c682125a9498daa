from tests.families.cases import Cases
from tests.families.cases.mamba import SMALL

CASES = Cases(config="FalconMambaConfig", model="FalconMambaForCausalLM", base={**SMALL, "mixer_rms_eps": 1e-3})
