import xml.etree.ElementTree as ET

from simulations.svg_charts import Chart, Line, merged

ONE, TWO = ((1.0, 0.5), (2.0, 1.0)), ((1.0, 0.4), (2.0, 0.9))


def test_lines_that_would_hide_each_other_share_one_with_all_their_names():
    lines = merged([Line("a", ONE), Line("b", TWO), Line("c", ONE)])
    assert lines == (Line("a, c", ONE), Line("b", TWO))
    many = merged(Line(f"client-{index}", ONE) for index in range(10))
    assert many == (Line("client-0 and 9 alike", ONE),)


def test_a_single_point_can_be_seen():
    chart = Chart("x", "Accuracy", "round", "accuracy", (Line("accuracy", ((40.0, 0.9),)), Line("other", ONE)))
    circles = [element for element in ET.fromstring(chart.svg()).iter() if element.tag.endswith("circle")]
    assert len(circles) == 1
