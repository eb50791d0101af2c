from __future__ import annotations

import pytest

from edgekd.report import formatting


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (formatting.milliseconds, 4.2149, "4.21 ms"),
        (formatting.milliseconds, 0.04217, "0.0422 ms"),
        (formatting.milliseconds, 9.996, "10.0 ms"),
        (formatting.milliseconds, 0.9999, "1.00 ms"),
        (formatting.milliseconds, 12345, "12,300 ms"),
        (formatting.number, 0.0, "0"),
        (formatting.number, -0.125, "−0.125"),
        (formatting.number, 2.5e-7, "2.50e−07"),
        (formatting.number, 1234567.0, "1.23e+06"),
        (formatting.percent, 0.91524, "91.52%"),
        (formatting.points, 0.004, "+0.40 points"),
        (formatting.points, -0.004, "−0.40 points"),
        (formatting.points, -0.00001, "0.00 points"),
        (formatting.points, 0.0, "0.00 points"),
        (formatting.decibels, 31.249, "31.2"),
        (formatting.decibels, -3.06, "−3.1"),
        (formatting.decibels, 200.0, "exact"),
        (formatting.times, 4.2149, "4.21x"),
        (formatting.size, 812, "812 bytes"),
        (formatting.size, 1_135_000, "1.14 MB"),
        (formatting.count, 272_474, "272 k"),
        (formatting.count, 1_730_714, "1.73 M"),
        (formatting.count, 812, "812"),
        (formatting.p_value, 0.2149, "p = 0.21"),
        (formatting.p_value, 1.0, "p = 1.0"),
        (formatting.p_value, 1e-9, "p < 0.001"),
    ],
)
def test_number(function, value, text):
    assert function(value) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("p99_ms", 4.2149, "4.21 ms"),
        ("size_bytes", 2_000_000, "2.00 MB"),
        ("cpu_hz", 2.4e9, "2.40 GHz"),
        ("soc_temperature_c", 56.54, "56.5 °C"),
        ("speedup", 3, "3.00x"),
        ("foreign_cpu_share", 0.0312, "3.12%"),
        ("top1", 0.9, "90.00%"),
        ("params", 272_474, "272,474"),
    ],
)
def test_quantity_follows_its_name(name, value, text):
    assert formatting.quantity(name, value) == text


def test_label():
    assert formatting.label("cpu_temperature_c") == ("CPU temperature", "°C")
    assert formatting.label("throughput_per_s") == ("Throughput", "/s")
    assert formatting.label("governor") == ("Governor", "")


def test_flat():
    facts = {"a": {"b": {"c": 1.5}, "on": True}, "list": [1, "x"], "none": None, "empty": {}}
    assert formatting.flat(facts) == [
        ("a.b.c", "1.5"),
        ("a.on", "yes"),
        ("list", "1, x"),
        ("none", "–"),
        ("empty", "–"),
    ]
