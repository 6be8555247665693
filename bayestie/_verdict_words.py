"""Sentences of a verdict, from its record."""

import math
from typing import Any

Record = dict[str, Any]


def plain(value: Any) -> Any:
    """JSON-able: inf as a string, NaN as null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return (
            None if math.isnan(value) else value if math.isfinite(value) else "inf" if value > 0 else "-inf"
        )
    return value


def write(record: Record) -> str:
    """The text of a sweep's verdict, paragraphs separated by blank lines."""
    paragraphs: list[str] = []
    for answer in record["answers"].values():
        paragraphs += _answer(answer, several=len(record["answers"]) > 1)
    paragraphs.append(_trust(record))
    return "\n\n".join(part for part in paragraphs if part)


def write_fit(record: Record) -> str:
    """The text for a single fit."""
    sites = _join(record["sites"]) or "this model"
    first = f"This is a fit of {sites} at one strength: it cannot say how much to share. Sweep it for that."
    score = ""
    if record["elpd"] is not None:
        error = "" if record["elpd_se"] is None else f" (standard error {record['elpd_se']:.1f})"
        score = f"Its leave-one-out predictive score (elpd) is {record['elpd']:.1f}{error}."
    trust = (
        "The draws are certified."
        if record["certified"]
        else f"The draws are not certified: {record['reason']}."
    )
    return "\n\n".join(part for part in (first, score, trust) if part)


def _answer(answer: Record, several: bool) -> list[str]:
    name = answer["strength"]
    if not answer["sites"]:
        return [_other_keyword(answer)]
    lead = f"{name}: " if several else ""
    paragraphs = [lead + _headline(answer)]
    if answer.get("supported"):
        paragraphs += [_range(answer), _factor(answer)]
    paragraphs += [_costs(answer), _tension(answer)]
    return paragraphs


def _headline(answer: Record) -> str:
    sites, name = _join(answer["sites"]), answer["strength"]
    end = _weakest(answer)
    match answer["recommendation"]:
        case "hard":
            return f"Share {sites} completely ({name} = 0): the data support one common value."
        case "soft":
            return (
                f"Share {sites} softly, with {name} about {_num(answer['posterior']['median'])}: the data "
                f"speak both against one common value and against {end}."
            )
        case "none":
            return f"Do not share {sites}: the data speak for {end} over any stronger sharing."
        case "hard or soft":
            if answer["hard_vs_soft"]["never_soft"]:
                return (
                    f"Share {sites}: one common value ({name} = 0) explains the data best, and the data "
                    f"speak against {end}. Soft sharing explains them no better, but is not ruled out."
                )
            return (
                f"Share {sites}, but how much is open: the data speak against {end}, and cannot tell one "
                f"common value ({name} = 0) from soft sharing."
            )
        case "soft or none":
            return (
                f"Do not share {sites} completely: the data speak against one common value, and cannot tell "
                f"soft sharing from {end}."
            )
        case _:
            return f"The data cannot tell how much {sites} should be shared."


def _weakest(answer: Record) -> str:
    weakest = answer.get("weakest")
    if weakest is None or weakest == "inf":
        return "no sharing"
    return f"the weakest sharing swept ({answer['strength']} = {_num(weakest)})"


def _range(answer: Record) -> str:
    name, (low, high) = answer["strength"], answer["supported"]
    swept_end = high == "inf" or high == answer["weakest"]
    reach = f"{name} from {_num(low)} to {_num(high)}" + (", the largest strength swept" if swept_end else "")
    posterior = answer["posterior"]
    chosen = (
        f"{answer['prior']}, whose median is the geometric middle of the strengths swept, chosen without "
        "looking at the data"
        if answer["prior_chosen"] != "by the user"
        else f"{answer['prior']}, as given"
    )
    return (
        f"The evidence is highest at {name} = {_num(answer['best'])}; within 20 to 1 of that lies {reach}. "
        f"If sharing is soft, and under the prior {chosen}, {name} is {_num(posterior['median'])} (median; "
        f"95% between {_num(posterior['low'])} and {_num(posterior['high'])})."
    )


def _factor(answer: Record) -> str:
    found = answer["hard_vs_soft"]
    if not found:
        return ""
    name = answer["strength"]
    low, high = found["sensitivity"]
    narrow, *_, wide = found["by_scale"]
    first = (
        f"Hard against soft sharing: log Bayes factor {_signed(found['log_bayes_factor'])}"
        f"{_error(found['error'])}, {_odds(found['log_bayes_factor'], 'hard', 'soft')}."
    )
    moves = (
        f"It depends on the prior on {name}: for half-normal, half-Cauchy, exponential and uniform priors "
        f"with medians from {_num(found['medians'][0])} to {_num(found['medians'][1])} it runs from "
        f"{_signed(low)} to {_signed(high)}"
    )
    trend = wide - narrow
    if abs(trend) > 0.1:
        moves += f", {'rising' if trend > 0 else 'falling'} as the prior widens"
    else:
        moves += ", hardly moving as the prior widens"
    if found["never_soft"]:
        last = f"No prior on {name} turns it round: the evidence is highest at {name} = 0."
    elif low < 0 < high:
        last = "Its sign changes within that range, so this part of the answer hangs on the prior."
    else:
        most = _signed(-found["max_log_soft"])
        last = f"Its sign is the same throughout; no prior at all could bring it below {most}."
    return f"{first} {moves}. {last}"


def _costs(answer: Record) -> str:
    sentences = []
    hard, none = answer.get("cost_of_hard") or {}, answer.get("cost_of_none") or {}
    if none.get("log_bayes_factor") is not None:
        sentences.append(
            f"Against soft sharing, {_weakest(answer)} has log Bayes factor "
            f"{_signed(-none['log_bayes_factor'])}{_error(none['error'])}."
        )
    prediction = answer["prediction"]
    if not prediction:
        return " ".join([*sentences, "Predictive scores were not kept."])
    name = answer["strength"]
    if prediction["all_alike"]:
        sentences.append(
            "In leave-one-out prediction the strengths cannot be told apart: no difference in elpd is above "
            "4 and beyond two of its standard errors."
        )
    else:
        low, high = prediction["alike"]
        sentences.append(
            f"In leave-one-out prediction {name} = {_num(prediction['best'])} does best, and {name} from "
            f"{_num(low)} to {_num(high)} cannot be told from it."
        )
    low_end = (
        "hard sharing"
        if prediction["lowest"] == 0
        else f"the strongest sharing swept ({name} = {_num(prediction['lowest'])})"
    )
    losses = [
        f"{what} costs {_loss(cost)}"
        for what, cost in (
            (low_end, prediction["hard"] | hard),
            (_weakest(answer), prediction["none"] | none),
        )
    ]
    sentences.append(f"In elpd against the best, {_join(losses)}.")
    if prediction["num_bad_k"]:
        sentences.append(
            f"At an end or at the best, these scores are unreliable for up to {prediction['num_bad_k']} "
            f"observation{'s' if prediction['num_bad_k'] > 1 else ''} (Pareto k too high)."
        )
    return " ".join(sentences)


def _loss(cost: Record) -> str:
    se = cost.get("se")
    loss = abs(cost["elpd_difference"])
    return f"{loss:.1f}" + ("" if se is None else f" \N{PLUS-MINUS SIGN} {se:.1f}")


def _tension(answer: Record) -> str:
    found = answer.get("tension")
    if not found:
        return ""
    shown = [f"{row['site']}[{row['tie']}] (by {_num(row['difference'])})" for row in found[:5]]
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return (
        f"At {answer['strength']} = {_num(found[0]['at'])} the data pull against {len(found)} "
        f"tie{'s' if len(found) > 1 else ''} more than the prior allows for: {_join(shown)}{more}."
    )


def _trust(record: Record) -> str:
    bad, total = record["uncertified"], record["num_points"]
    if record["certified"]:
        words = f"The draws of all {total} swept points are certified."
    elif not bad:
        words = "The tree does not say whether its draws are certified: do not rely on these numbers."
    else:
        first = bad[0]
        where = ", ".join(f"{key} = {_num(value)}" for key, value in first.items() if key != "reason")
        words = (
            f"{len(bad)} of {total} swept points are not certified (the first at {where}: "
            f"{first['reason']}): do not rely on the numbers there, nor on an answer that rests on them."
        )
    return " ".join([words, *(caveat[:1].upper() + caveat[1:] for caveat in record["caveats"])])


def _other_keyword(answer: Record) -> str:
    name, parts = answer["strength"], []
    if answer.get("best_by_evidence") is not None:
        parts.append(f"the evidence is highest at {_num(answer['best_by_evidence'])}")
    if answer["prediction"]:
        low, high = answer["prediction"]["alike"]
        parts.append(
            f"leave-one-out prediction is best at {_num(answer['prediction']['best'])}, and values from "
            f"{_num(low)} to {_num(high)} cannot be told from it"
        )
    found = f": {'; '.join(parts)}" if parts else ""
    return f"{name} is not the strength of a tie, so it says nothing about sharing{found}."


def _num(x: float | str) -> str:
    return str(x) if isinstance(x, str) else f"{x:.3g}"


def _signed(x: float) -> str:
    return f"{x:+.2f}"


def _error(x: float | None) -> str:
    return "" if not x or x < 0.005 else f" \N{PLUS-MINUS SIGN} {x:.2f}"


def _odds(log_factor: float, one: str, other: str) -> str:
    favoured = one if log_factor > 0 else other
    size = math.exp(min(abs(log_factor), 50.0))
    if size < 1.1:
        return "even odds"
    number = f"{size:.1f}" if size < 10 else f"{size:.0f}" if size < 1000 else "more than 1000"
    return f"{number} to 1 for {favoured} sharing"


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""
