import pytest

from openvla_hf.modeling.known_names import LONGEST_LIST, check_name


def test_a_known_name_passes_and_the_error_for_an_unknown_one_suggests_the_closest():
    check_name("bridge_orig", {"bridge_orig": 1}, "dataset")
    with pytest.raises(ValueError, match=r"^Unknown dataset 'bridge'\. Did you mean 'bridge_orig'\? Choose from 'br"):
        check_name("bridge", ["bridge_orig", "fractal"], "dataset")
    with pytest.raises(ValueError, match=r"^Unknown dataset 3\. Choose from 'bridge_orig'\.$"):
        check_name(3, ["bridge_orig"], "dataset")
    with pytest.raises(ValueError, match=r"^Unknown dataset 'bridge'\. None are available\.$"):
        check_name("bridge", [], "dataset")


def test_a_long_list_of_names_is_left_out():
    many = [f"field_{index}" for index in range(LONGEST_LIST + 1)]
    with pytest.raises(ValueError, match=r"^Unknown field 'field_77'\. Did you mean 'field_\d+'\?$"):
        check_name("field_77", many, "field")
