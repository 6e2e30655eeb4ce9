//! Windows of time in which another value holds, such as a lower limit in office hours. UTC, to the second.
//!
//! A window has a start and a stop (which is outside of it), each a [`Moment`]: the widest field that is given
//! says how often it comes back. `minute` 0 to 15 is each hour; `hour` 22 to 6 each day, over midnight;
//! `weekday` to `weekday` each week; `day` each month; `month` each year. A day that a month does not have is
//! the moment after its last one. Windows of one schedule do not overlap, so that at each moment one value is
//! meant; whether two ever do is reckoned over the 400 years after which the calendar repeats itself. All
//! functions are pure; time is seconds since 1970.

use std::fmt;

pub use time::Weekday;
use time::{Date, Month, OffsetDateTime};

const MINUTE: i64 = 60;
const HOUR: i64 = 3_600;
const DAY: i64 = 86_400;
const WEEK: i64 = 7 * DAY;

/// Parses the English name of a day of the week in lower case, or its first three letters.
pub fn parse_weekday(text: &str) -> Option<Weekday> {
    let mut days = std::iter::successors(Some(Weekday::Monday), |day| Some(day.next())).take(7);
    days.find(|day| {
        let name = day.to_string().to_lowercase();
        name == text || name.get(..3) == Some(text)
    })
}

/// Start or stop of a window, as written: any field may be absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// 0 to 59.
    pub second: Option<u8>,
    /// 0 to 59.
    pub minute: Option<u8>,
    /// 0 to 23; as a stop also 24.
    pub hour: Option<u8>,
    /// Day of the month: 1 to 31.
    pub day: Option<u8>,
    /// 1 to 12.
    pub month: Option<u8>,
    /// Day of the week; not together with `day` or `month`.
    pub weekday: Option<Weekday>,
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weekday = self.weekday.map(|day| ("weekday", day.to_string().to_lowercase()));
        let number = |name, value: Option<u8>| value.map(|value| (name, value.to_string()));
        let fields = [
            number("month", self.month),
            number("day", self.day),
            weekday,
            number("hour", self.hour),
            number("minute", self.minute),
            number("second", self.second),
        ];
        let mut gap = "";
        for (name, value) in fields.into_iter().flatten() {
            write!(f, "{gap}{name} {value}")?;
            gap = " ";
        }
        Ok(())
    }
}

/// Why windows make no schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// A field is outside its range, or such a day never comes.
    #[error("\"{0}\" never happens")]
    Never(Moment),
    /// No field is given.
    #[error("a window needs a start and a stop with at least one field each")]
    Empty,
    /// A narrow and a wide field without the one between.
    #[error("\"{0}\" must give all fields between its widest and its narrowest")]
    Gap(Moment),
    /// A day of the week together with a date.
    #[error("\"{0}\" must have a weekday, or a day and a month, not both")]
    WeekdayAndDate(Moment),
    /// Start and stop come back at different times.
    #[error("start \"{start}\" and stop \"{stop}\" must have the same widest field")]
    Periods { start: Moment, stop: Moment },
    /// Start and stop are the same.
    #[error(
        "a window from \"{0}\" to the same moment is empty; for a limit at all times, set the limit itself"
    )]
    Nothing(Moment),
    /// Two windows share a moment.
    #[error("the windows \"{}\" and \"{}\" overlap", .0.0, .0.1)]
    Overlap(Box<(Window, Window)>),
    /// More than [`MAX_WINDOWS`].
    #[error("{0} windows must be at most {most}", most = MAX_WINDOWS)]
    TooMany(usize),
}

/// The most windows in one schedule: each call of such a rule looks at all of them.
pub const MAX_WINDOWS: usize = 32;

/// How often a window comes back; from short to long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Period {
    Minute,
    Hour,
    Day,
    Week,
    Month,
    Year,
}

/// A moment within a period. Month and day count from 0 and are 0 where the period has none; a `Week` keeps its
/// day in `day`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Spot {
    month: u8,
    day: u8,
    second: i64,
}

/// A time that comes back. Valid by construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    period: Period,
    start: Spot,
    stop: Spot,
    written: (Moment, Moment),
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.written.0, self.written.1)
    }
}

impl Window {
    /// From `start` to just before `stop`; a `stop` before `start` is the one of the next period.
    ///
    /// # Errors
    /// [`ScheduleError`] for a window that is never open, or that two people would read in two ways.
    pub fn new(start: Moment, stop: Moment) -> Result<Self, ScheduleError> {
        let (period, from) = spot(&start, 23)?;
        let (stop_period, to) = spot(&stop, 24)?;
        if period != stop_period {
            return Err(ScheduleError::Periods { start, stop });
        }
        if from == to {
            return Err(ScheduleError::Nothing(start));
        }
        Ok(Self { period, start: from, stop: to, written: (start, stop) })
    }

    /// Whether `unix` lies in the window.
    fn is_open(&self, unix: i64) -> bool {
        let now = spot_of(self.period, unix);
        if self.start < self.stop {
            self.start <= now && now < self.stop
        } else {
            self.start <= now || now < self.stop
        }
    }

    /// When it last opened or closed, not after `unix`.
    fn changed(&self, unix: i64) -> Option<i64> {
        if let Some((start, length, period)) = self.fixed() {
            let open = (unix - start).rem_euclid(period);
            return Some(unix - if open < length { open } else { open - length });
        }
        self.moments(unix)?.into_iter().filter(|moment| *moment <= unix).max()
    }

    /// When it next opens or closes, after `unix`.
    fn changes(&self, unix: i64) -> Option<i64> {
        if let Some((start, length, period)) = self.fixed() {
            let open = (unix - start).rem_euclid(period);
            return Some(unix + if open < length { length - open } else { period - open });
        }
        self.moments(unix)?.into_iter().filter(|moment| *moment > unix).min()
    }

    /// When a window of months or years opens and closes in the period of `unix`, the one before it and the one after it.
    fn moments(&self, unix: i64) -> Option<[i64; 6]> {
        let date = OffsetDateTime::from_unix_timestamp(unix).ok()?.date();
        let (year, month) = (date.year(), u8::from(date.month()) - 1);
        let [before, this, after] = match (self.period, month) {
            (Period::Month, 0) => [(year - 1, 11), (year, 0), (year, 1)],
            (Period::Month, 11) => [(year, 10), (year, 11), (year + 1, 0)],
            (Period::Month, month) => [(year, month - 1), (year, month), (year, month + 1)],
            _ => [(year - 1, 0), (year, 0), (year + 1, 0)],
        };
        let at = |(year, month), spot: Spot| {
            let month = month + spot.month;
            let second = month_start(year, month) + i64::from(spot.day) * DAY + spot.second;
            second.min(month_start(year, month + 1))
        };
        let Self { start, stop, .. } = *self;
        Some([
            at(before, start),
            at(before, stop),
            at(this, start),
            at(this, stop),
            at(after, start),
            at(after, stop),
        ])
    }

    /// Whether both are ever open at once.
    fn meets(&self, other: &Self) -> bool {
        let (longer, shorter) = if self.period >= other.period { (self, other) } else { (other, self) };
        match (longer.fixed(), shorter.fixed()) {
            (Some((start, length, _)), Some(short)) => recurs_in(short, start, start + length),
            (None, Some(short)) => longer.spans().into_iter().any(|(from, to)| recurs_in(short, from, to)),
            // A shorter period is fixed whenever the longer is.
            (_, None) => {
                let mut spans = longer.spans();
                spans.extend(shorter.spans());
                spans.sort_unstable();
                // The parts of one window touch, and never overlap: a pair that does is of two windows.
                spans.windows(2).any(|pair| matches!(pair, [(_, end), (begin, _)] if begin < end))
            }
        }
    }

    /// Start, length and period in seconds, of a window whose period always has the same length.
    fn fixed(&self) -> Option<(i64, i64, i64)> {
        let period = match self.period {
            Period::Minute => MINUTE,
            Period::Hour => HOUR,
            Period::Day => DAY,
            Period::Week => WEEK,
            Period::Month | Period::Year => return None,
        };
        let second = |spot: Spot| i64::from(spot.day) * DAY + spot.second;
        // 1970 began on a Thursday, weeks begin on Monday.
        let shift = if self.period == Period::Week { 4 * DAY } else { 0 };
        let length = (second(self.stop) - second(self.start)).rem_euclid(period);
        // From 0:00 to 24:00, say: all the time.
        let length = if length == 0 { period } else { length };
        Some((second(self.start) + shift, length, period))
    }

    /// When a window of months or years is open in 400 years, part by part.
    fn spans(&self) -> Vec<(i64, i64)> {
        let mut spans = Vec::new();
        let mut add = |from: i64, to: i64| {
            if from < to {
                spans.push((from, to));
            }
        };
        for year in 2000..2400 {
            let months = if self.period == Period::Month { 0..12 } else { 0..1 };
            for month in months {
                let (begin, end) = match self.period {
                    Period::Month => (month_start(year, month), month_start(year, month + 1)),
                    _ => (month_start(year, 0), month_start(year + 1, 0)),
                };
                let at = |spot: Spot| {
                    let month = month + spot.month;
                    (month_start(year, month) + i64::from(spot.day) * DAY + spot.second)
                        .min(month_start(year, month + 1))
                        .min(end)
                };
                let (start, stop) = (at(self.start), at(self.stop));
                if self.start < self.stop {
                    add(start, stop);
                } else {
                    add(begin, stop);
                    add(start, end);
                }
            }
        }
        spans
    }
}

/// Values that hold in windows, of which no two are ever open at once.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule<V>(Vec<(Window, V)>);

impl<V> Default for Schedule<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<V> Schedule<V> {
    /// A value for each window.
    ///
    /// # Errors
    /// [`ScheduleError`] for too many windows, or names two that are ever open at once.
    pub fn new(windows: Vec<(Window, V)>) -> Result<Self, ScheduleError> {
        if windows.len() > MAX_WINDOWS {
            return Err(ScheduleError::TooMany(windows.len()));
        }
        for (at, (window, _)) in windows.iter().enumerate() {
            if let Some((other, _)) = windows.iter().take(at).find(|(other, _)| other.meets(window)) {
                return Err(ScheduleError::Overlap(Box::new((*other, *window))));
            }
        }
        Ok(Self(windows))
    }

    /// Other values in the same windows.
    pub fn map<U>(&self, value: impl Fn(&V) -> U) -> Schedule<U> {
        Schedule(self.0.iter().map(|(window, of)| (*window, value(of))).collect())
    }

    /// Whether there is no window.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of the window that is open, and when a window last opened or closed, not after `unix`.
    pub fn look(&self, unix: i64) -> (Option<&V>, Option<i64>) {
        self.0.iter().fold((None, None), |(open, changed), (window, value)| {
            (open.or_else(|| window.is_open(unix).then_some(value)), changed.max(window.changed(unix)))
        })
    }

    /// When a window next opens or closes after `unix`, and the value of the window that is open then.
    pub fn next(&self, unix: i64) -> Option<(i64, Option<&V>)> {
        let next = self.0.iter().filter_map(|(window, _)| window.changes(unix)).min()?;
        Some((next, self.look(next).0))
    }

    /// All values.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.0.iter().map(|(_, value)| value)
    }
}

/// Checks a moment, and says how often it comes back.
fn spot(moment: &Moment, last_hour: u8) -> Result<(Period, Spot), ScheduleError> {
    let Moment { second, minute, hour, day, month, weekday } = *moment;
    if weekday.is_some() && (day.is_some() || month.is_some()) {
        return Err(ScheduleError::WeekdayAndDate(*moment));
    }
    let given = |field: Option<u8>| field.is_some();
    let (period, day_given) = match (month, day, weekday, hour, minute, second) {
        (Some(_), ..) => (Period::Year, given(day)),
        (None, Some(_), ..) => (Period::Month, true),
        (None, None, Some(_), ..) => (Period::Week, true),
        (None, None, None, Some(_), ..) => (Period::Day, true),
        (None, None, None, None, Some(_), _) => (Period::Hour, true),
        (None, None, None, None, None, Some(_)) => (Period::Minute, true),
        (None, None, None, None, None, None) => return Err(ScheduleError::Empty),
    };
    let no_hour = period >= Period::Day && hour.is_none();
    let no_minute = period >= Period::Hour && minute.is_none();
    if (!day_given && given(hour)) || (no_hour && given(minute)) || (no_minute && given(second)) {
        return Err(ScheduleError::Gap(*moment));
    }
    let clock = [(hour, last_hour), (minute, 59), (second, 59)];
    let [hour, minute, second] = clock.map(|(field, _)| i64::from(field.unwrap_or(0)));
    let in_range = clock.iter().all(|(field, most)| field.is_none_or(|it| it <= *most));
    let after_midnight = hour == 24 && minute + second > 0;
    let (month, day) = (month.unwrap_or(1), day.unwrap_or(1));
    // Of a leap year. Where no month is given, some month has 31 days.
    let longest = Month::try_from(month).map_or(0, |month| month.length(2000));
    if !in_range || after_midnight || !(1..=longest).contains(&day) {
        return Err(ScheduleError::Never(*moment));
    }
    let day = weekday.map_or(day - 1, Weekday::number_days_from_monday);
    let second = hour * HOUR + minute * MINUTE + second;
    Ok((period, Spot { month: month - 1, day, second }))
}

/// Where in its period a second lies.
fn spot_of(period: Period, unix: i64) -> Spot {
    let flat = |second| Spot { month: 0, day: 0, second };
    // Beyond the year 9999 nobody looks.
    let date = || OffsetDateTime::from_unix_timestamp(unix).unwrap_or(OffsetDateTime::UNIX_EPOCH).date();
    let second = unix.rem_euclid(DAY);
    match period {
        Period::Minute => flat(unix.rem_euclid(MINUTE)),
        Period::Hour => flat(unix.rem_euclid(HOUR)),
        Period::Day => flat(second),
        Period::Week => Spot { month: 0, day: date().weekday().number_days_from_monday(), second },
        Period::Month => Spot { month: 0, day: date().day() - 1, second },
        Period::Year => {
            let date = date();
            Spot { month: u8::from(date.month()) - 1, day: date.day() - 1, second }
        }
    }
}

/// When a month begins; `month` counts from 0, and 12 is January of the next year.
fn month_start(year: i32, month: u8) -> i64 {
    let first = Month::try_from(month % 12 + 1)
        .ok()
        .and_then(|of_year| Date::from_calendar_date(year + i32::from(month / 12), of_year, 1).ok());
    first.map_or(i64::MAX, |first| first.midnight().assume_utc().unix_timestamp())
}

/// Whether a window with this start, length and period is open at some time in `from..to`.
fn recurs_in((start, length, period): (i64, i64, i64), from: i64, to: i64) -> bool {
    let until_next = (start - from).rem_euclid(period);
    until_next < to - from || period - until_next < length
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn moment(text: &str) -> Moment {
        let mut moment = Moment::default();
        for field in text.split_whitespace() {
            let (kind, value) = field.split_at(1);
            if kind == "w" {
                moment.weekday = parse_weekday(value);
                continue;
            }
            let value = Some(value.parse().unwrap());
            match kind {
                "s" => moment.second = value,
                "m" => moment.minute = value,
                "h" => moment.hour = value,
                "d" => moment.day = value,
                "M" => moment.month = value,
                other => panic!("{other}"),
            }
        }
        moment
    }

    fn window(text: &str) -> Result<Window, ScheduleError> {
        let (start, stop) = text.split_once('-').unwrap();
        Window::new(moment(start), moment(stop))
    }

    #[test]
    fn windows_open_and_close() {
        // 2026-11-23 is a Monday; `date -u -d ... +%s`.
        const MONDAY: i64 = 1_795_392_000;
        let at = |days: i64, hour: i64, minute: i64, second: i64| {
            MONDAY + days * DAY + hour * HOUR + minute * MINUTE + second
        };
        for (case, text, unix, open) in [
            ("first second", "h9-h17", at(0, 9, 0, 0), true),
            ("second before", "h9-h17", at(0, 8, 59, 59), false),
            ("last second", "h9-h17", at(0, 16, 59, 59), true),
            ("stop is outside", "h9-h17", at(0, 17, 0, 0), false),
            ("over midnight, before", "h22-h6", at(0, 23, 0, 0), true),
            ("over midnight, after", "h22-h6", at(0, 5, 59, 59), true),
            ("over midnight, outside", "h22-h6", at(0, 6, 0, 0), false),
            ("to the end of the day", "h22-h24", at(0, 23, 59, 59), true),
            ("all day", "h0-h24", at(3, 12, 0, 0), true),
            ("quarter of an hour", "m0-m15", at(2, 7, 14, 59), true),
            ("quarter of an hour, over", "m0-m15", at(2, 7, 15, 0), false),
            ("seconds", "s30-s40", at(2, 7, 15, 35), true),
            ("working week, Monday", "wmon h9-wfri h17", at(0, 9, 0, 0), true),
            ("working week, night", "wmon h9-wfri h17", at(2, 3, 0, 0), true),
            ("working week, Friday evening", "wmon h9-wfri h17", at(4, 17, 0, 0), false),
            ("weekend over Sunday", "wsat-wmon", at(6, 23, 59, 59), true),
            ("weekend, Monday", "wsat-wmon", at(7, 0, 0, 0), false),
            ("day of month", "d23-d24", at(0, 1, 0, 0), true),
            ("next day", "d23-d24", at(1, 0, 0, 0), false),
            ("end of month", "d25-d1", at(7, 23, 0, 0), true),
            ("first of month", "d25-d1", at(8, 0, 0, 0), false),
            ("month", "M11-M12", at(0, 0, 0, 0), true),
            ("year's end, before", "M12 d24-M1 d2", at(31, 0, 0, 0), true),
            ("year's end, after", "M12 d24-M1 d2", at(39, 23, 59, 59), true),
            ("year's end, over", "M12 d24-M1 d2", at(40, 0, 0, 0), false),
            ("leap day of a common year opens in March", "M2 d29-M3 d2", 1_772_323_200, true),
            ("and not in February", "M2 d29-M3 d2", 1_772_323_199, false),
            ("before 1970", "h9-h17", -1, false),
        ] {
            assert_eq!(window(text).unwrap().is_open(unix), open, "{case}");
        }
    }

    /// Whatever the window: it is open, or not, from the moment on at which it last changed, and was not just before it.
    #[test]
    fn a_window_has_changed_when_it_opened_or_closed() {
        let texts = [
            "h9-h17",
            "h22-h6",
            "h22-h24",
            "m0-m15",
            "s30-s40",
            "wmon h9-wfri h17",
            "wsat-wmon",
            "d23-d24",
            "d25-d1",
            "d31-d2",
            "M11-M12",
            "M12 d24-M1 d2",
            "M2 d29-M3 d2",
        ];
        for text in texts {
            let window = window(text).unwrap();
            // From 2026 on, over a leap day, at odd moments.
            for step in 0..1_000_i64 {
                let unix = 1_767_225_600 + step * 87_661;
                let changed = window.changed(unix).unwrap();
                let is_open = window.is_open(unix);
                let looked = Schedule(vec![(window, ())]);
                assert_eq!(looked.look(unix), (is_open.then_some(&()), Some(changed)), "{text}, {unix}");
                assert!(changed <= unix, "{text}, {unix}: {changed}");
                assert_eq!(window.is_open(changed), is_open, "{text}, {unix}: {changed}");
                assert_ne!(window.is_open(changed - 1), is_open, "{text}, {unix}: {changed}");
                let between = changed + (unix - changed) / 2;
                assert_eq!(window.is_open(between), is_open, "{text}, {unix}: {changed}");
                let next = window.changes(unix).unwrap();
                assert_eq!(looked.next(unix), Some((next, (!is_open).then_some(&()))), "{text}, {unix}");
                assert!(next > unix, "{text}, {unix}: {next}");
                assert_eq!(window.changed(next - 1), Some(changed), "{text}, {unix}: {next}");
                assert_ne!(window.is_open(next), is_open, "{text}, {unix}: {next}");
            }
        }
        // All day: what it was before does not matter.
        assert_eq!(window("h0-h24").unwrap().changed(1_795_392_000 + 5), Some(1_795_392_000));
    }

    #[test]
    fn windows_that_cannot_be_meant_are_errors() {
        use ScheduleError as E;
        let never = |text: &str| E::Never(moment(text));
        for (case, text, want) in [
            ("31 September", "M9 d31-M10 d1", never("M9 d31")),
            ("31 September as a stop", "M9 d1-M9 d31", never("M9 d31")),
            ("30 February", "M2 d30-M3 d1", never("M2 d30")),
            ("32nd", "d32-d1", never("d32")),
            ("day 0", "d0-d1", never("d0")),
            ("month 13", "M13-M1", never("M13")),
            ("hour 24 starts nothing", "h24-h1", never("h24")),
            ("after 24:00", "h23-h24 m1", never("h24 m1")),
            ("minute 60", "m60-m10", never("m60")),
            ("second 60", "s1-s60", never("s60")),
            ("nothing", "-h1", E::Empty),
            ("weekday and date", "wmon d1-wtue d1", E::WeekdayAndDate(moment("wmon d1"))),
            ("gap", "h1 s3-h2", E::Gap(moment("h1 s3"))),
            ("gap after month", "M3 h3-M4 h3", E::Gap(moment("M3 h3"))),
            ("other periods", "h3-m3", E::Periods { start: moment("h3"), stop: moment("m3") }),
            ("empty", "h3-h3", E::Nothing(moment("h3"))),
        ] {
            assert_eq!(window(text), Err(want), "{case}");
        }
    }

    #[test]
    fn overlap_is_found_between_all_periods() {
        for (case, a, b, meets) in [
            ("touch", "h9-h12", "h12-h17", false),
            ("share an hour", "h9-h13", "h12-h17", true),
            ("midnight", "h22-h6", "h5-h7", true),
            ("same", "h22-h6", "h22-h6", true),
            ("inside a week", "wsat-wmon", "h3-h4", true),
            ("between", "wmon h9-wmon h10", "h10-h11", false),
            ("minutes in an hour", "h9 m10-h9 m20", "m20-m30", false),
            ("minutes meet an hour", "h9 m10-h9 m21", "m20-m30", true),
            ("a date falls on every weekday", "M12 d24-M12 d25", "wwed-wthu", true),
            ("days that only some months have", "d31-d1", "M2-M3", false),
            ("leap day", "M2 d29-M3 d1", "d29-d30", true),
            ("months apart", "M1-M2", "M3-M4", false),
            ("day of another month", "M1 d1-M1 d2", "d2-d3", false),
            ("all day and any", "h0-h24", "M7 d4-M7 d5", true),
            ("seconds", "s0-s10", "s10-s20", false),
        ] {
            let (a, b) = (window(a).unwrap(), window(b).unwrap());
            assert_eq!((a.meets(&b), b.meets(&a)), (meets, meets), "{case}");
            let schedule = Schedule::new(vec![(a, ()), (b, ())]).map(drop);
            let want = if meets { Err(ScheduleError::Overlap(Box::new((a, b)))) } else { Ok(()) };
            assert_eq!(schedule, want, "{case}");
        }
    }

    /// The calendar, counted day by day from 1970: (month, day, weekday), from 0.
    fn calendar(days: usize) -> Vec<(i64, i64, i64)> {
        let (mut year, mut month, mut day, mut weekday) = (1970, 0, 0, 3);
        let mut out = Vec::new();
        for _ in 0..days {
            out.push((month, day, weekday));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let lengths = [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            day += 1;
            weekday = (weekday + 1) % 7;
            if day == lengths[usize::try_from(month).unwrap()] {
                (day, month) = (0, month + 1);
            }
            if month == 12 {
                (month, year) = (0, year + 1);
            }
        }
        out
    }

    #[test]
    fn the_calendar_is_right_for_500_years() {
        let mut begins = 0;
        let mut year = 1969;
        for (days, (month, day, weekday)) in (0..).zip(calendar(500 * 366)) {
            year += i32::from((month, day) == (0, 0));
            let spot = spot_of(Period::Year, days * DAY);
            assert_eq!((i64::from(spot.month), i64::from(spot.day)), (month, day), "day {days}");
            assert_eq!(i64::from(spot_of(Period::Week, days * DAY).day), weekday, "day {days}");
            if day == 0 {
                let month = u8::try_from(month).unwrap();
                assert_eq!(month_start(year, month), days * DAY, "day {days}");
                begins += 1;
            }
        }
        assert!(begins > 6000);
    }

    /// Windows to the hour, so that an oracle can try each hour.
    fn any_window() -> impl Strategy<Value = Window> {
        let hour = || 0..24_u8;
        let day = |weekday: u8| Weekday::Monday.nth_next(weekday);
        let daily = (hour(), hour())
            .prop_map(|(a, b)| [a, b].map(|hour| Moment { hour: Some(hour), ..Moment::default() }));
        let weekly = (0..7_u8, 0..7_u8, hour(), hour()).prop_map(move |(a, b, c, d)| {
            [(a, c), (b, d)].map(|(weekday, hour)| Moment {
                weekday: Some(day(weekday)),
                hour: Some(hour),
                ..Moment::default()
            })
        });
        let monthly = (1..32_u8, 1..32_u8)
            .prop_map(|(a, b)| [a, b].map(|day| Moment { day: Some(day), ..Moment::default() }));
        let yearly = (1..13_u8, 1..32_u8, 1..13_u8, 1..32_u8, hour()).prop_map(|(a, b, c, d, hour)| {
            [(a, b), (c, d)].map(|(month, day)| Moment {
                month: Some(month),
                day: Some(day),
                hour: Some(hour),
                ..Moment::default()
            })
        });
        prop_oneof![daily, weekly, monthly, yearly]
            .prop_filter_map("no window", |[start, stop]| Window::new(start, stop).ok())
    }

    /// What the fields of a window say about an hour of the calendar.
    fn oracle(window: &Window, (month, day, weekday): (i64, i64, i64), hour: i64) -> bool {
        let value = |moment: &Moment| {
            let number = |field: Option<u8>, low: i64| field.map_or(low, i64::from);
            let hour = number(moment.hour, 0);
            match (moment.month, moment.day, moment.weekday) {
                (Some(month), day, _) => (i64::from(month) * 100 + number(day, 1)) * 100 + hour,
                (None, Some(day), _) => i64::from(day) * 100 + hour,
                (None, None, Some(weekday)) => i64::from(weekday.number_days_from_monday()) * 100 + hour,
                (None, None, None) => hour,
            }
        };
        let (start, stop) = &window.written;
        let now = match (start.month, start.day, start.weekday) {
            (Some(_), ..) => ((month + 1) * 100 + day + 1) * 100 + hour,
            (None, Some(_), _) => (day + 1) * 100 + hour,
            (None, None, Some(_)) => weekday * 100 + hour,
            (None, None, None) => hour,
        };
        let (start, stop) = (value(start), value(stop));
        if start < stop { start <= now && now < stop } else { start <= now || now < stop }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        #[test]
        fn open_and_overlap_are_what_trying_every_hour_says(a in any_window(), b in any_window()) {
            // 28 years: every date on every weekday, leap days included.
            let mut both = false;
            for (days, date) in (0..).zip(calendar(28 * 366)) {
                for hour in 0..24 {
                    let unix = days * DAY + hour * HOUR;
                    let (open_a, open_b) = (oracle(&a, date, hour), oracle(&b, date, hour));
                    prop_assert_eq!(a.is_open(unix), open_a);
                    prop_assert_eq!(b.is_open(unix + HOUR - 1), open_b);
                    both |= open_a && open_b;
                }
            }
            prop_assert_eq!(a.meets(&b), both);
        }
    }
}
