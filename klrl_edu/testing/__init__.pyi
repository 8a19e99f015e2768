"""The public names of klrl_edu.testing, listed once: the package reads this file and imports each
on first use.
"""

from klrl_edu.testing.assertions import assert_same_gradient as assert_same_gradient
from klrl_edu.testing.assertions import assert_unbiased as assert_unbiased
from klrl_edu.testing.assertions import assert_variance_at_most as assert_variance_at_most
from klrl_edu.testing.laws import TOLERANCES as TOLERANCES
from klrl_edu.testing.laws import assert_is_language_model as assert_is_language_model
from klrl_edu.testing.laws import check_causal as check_causal
from klrl_edu.testing.laws import check_causal_reward as check_causal_reward
from klrl_edu.testing.laws import check_decoding as check_decoding
from klrl_edu.testing.laws import check_decoding_gradient as check_decoding_gradient
from klrl_edu.testing.laws import check_eos_absorbs as check_eos_absorbs
from klrl_edu.testing.laws import check_language_model as check_language_model
from klrl_edu.testing.laws import check_normalised as check_normalised
from klrl_edu.testing.laws import check_prompts as check_prompts
from klrl_edu.testing.laws import check_refuses_past_end as check_refuses_past_end
from klrl_edu.testing.laws import check_rows_independent as check_rows_independent
from klrl_edu.testing.laws import check_samples_belong as check_samples_belong
from klrl_edu.testing.laws import check_state_dict as check_state_dict
from klrl_edu.testing.laws import example_tokens as example_tokens
from klrl_edu.testing.statistical import assert_mean_is as assert_mean_is
from klrl_edu.testing.statistical import assert_samples_from as assert_samples_from
from klrl_edu.testing.strategies import EXTREME_LOG_WEIGHTS as EXTREME_LOG_WEIGHTS
from klrl_edu.testing.strategies import KL_COEFS as KL_COEFS
from klrl_edu.testing.strategies import distributions as distributions
from klrl_edu.testing.strategies import log_probs as log_probs
from klrl_edu.testing.strategies import log_weights as log_weights
from klrl_edu.testing.strategies import policies as policies
from klrl_edu.testing.strategies import problems as problems
from klrl_edu.testing.strategies import rewards as rewards
from klrl_edu.testing.strategies import sequence_tables as sequence_tables
from klrl_edu.testing.strategies import spaces as spaces
