//! The labels of namespaces, from the API server.
//!
//! A namespace's name comes from the kubelet's list, so that who makes namespaces makes pods run here first.

use std::{io, sync::Arc, time::Duration};

use serde::{Deserialize, de::Error as _};
use tokio::runtime::Runtime;

use super::{
    asker::ServiceQuestion,
    client::KubernetesClient,
    fault::KubernetesFault,
    metrics::{RequestSeries, SeriesWords},
    pods::{Excess, PodExcess, RawLabels, ShortText},
    rhythm::RequestRhythm,
};

/// A namespace, as far as selectors are made of it.
#[derive(Debug)]
pub(super) struct ListedNamespace {
    pub(super) labels: Box<[(Box<str>, Box<str>)]>,
    /// What is larger than it may be: nothing can be told of it then.
    pub(super) excess: Option<PodExcess>,
}

#[derive(Deserialize)]
struct RawNamespace {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: RawNamespaceMetadata,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawNamespaceMetadata {
    name: ShortText,
    labels: RawLabels,
}

impl ListedNamespace {
    /// Reads the namespace of this name as it comes.
    fn read(reader: impl io::Read, name: &str) -> Result<Self, serde_json::Error> {
        let mut json = serde_json::Deserializer::from_reader(reader);
        let RawNamespace { kind, metadata } = RawNamespace::deserialize(&mut json)?;
        json.end()?;
        let mut excess = Excess::default();
        if kind != "Namespace" || *excess.text(metadata.name) != *name {
            return Err(serde_json::Error::custom("it is not the Namespace that was asked for"));
        }
        let labels = excess.labels(metadata.labels);
        Ok(Self { labels, excess: excess.0 })
    }

    /// Its size in memory, in bytes.
    fn size(&self) -> usize {
        let texts: usize = self.labels.iter().map(|(key, value)| key.len() + value.len()).sum();
        size_of::<Self>() + size_of_val(&*self.labels) + texts
    }
}

/// Which labels a namespace has.
pub(super) struct NamespaceQuestion;

impl ServiceQuestion for NamespaceQuestion {
    /// Its name.
    type Key = Arc<str>;
    type Answer = Arc<ListedNamespace>;

    const THREAD: &'static str = "api-server";
    /// Twenty a second: whoever waits has what failed asked for again.
    const RHYTHM: RequestRhythm = RequestRhythm {
        a_second: 20,
        pause: Duration::from_millis(50),
        pause_after_fault: Duration::from_millis(250),
    };
    const SERIES: RequestSeries = RequestSeries {
        requests: SeriesWords {
            name: "durward_api_server_requests_total",
            help: "Requests to the API server for labels of namespaces, by what came of them.",
        },
        counted: SeriesWords {
            name: "durward_api_server_labels",
            help: "Labels in the last answer of the API server about a namespace.",
        },
    };
    const TROUBLE: &'static str = "the API server does not say which labels a namespace has, so callers that need one cannot be identified";
    const UNTRIED: &'static str = "the API server has not said yet which labels a namespace has";

    fn ask(
        client: &mut KubernetesClient,
        runtime: &Runtime,
        name: &Arc<str>,
    ) -> Result<Arc<ListedNamespace>, KubernetesFault> {
        let is_name =
            !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if !is_name {
            return Err(KubernetesFault::Internal("the pod's namespace has no name that Kubernetes allows"));
        }
        let path = format!("/api/v1/namespaces/{name}");
        client.get(runtime, &path, |body| ListedNamespace::read(body, name)).map(Arc::new)
    }

    fn size(found: &Arc<ListedNamespace>) -> usize {
        found.size()
    }

    fn count(found: &Arc<ListedNamespace>) -> usize {
        found.labels.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_read_if_it_is_the_one_that_was_asked_for() {
        let read = |text: &str| ListedNamespace::read(text.as_bytes(), "shop");
        let labels = |text| read(text).map(|it| it.labels.into_vec()).map_err(|error| error.to_string());
        let team: Vec<(Box<str>, Box<str>)> = vec![("team".into(), "blue".into())];
        for (case, text, want) in [
            (
                "labels",
                r#"{"kind":"Namespace","metadata":{"name":"shop","labels":{"team":"blue"}}}"#,
                Ok(team),
            ),
            ("no labels", r#"{"kind":"Namespace","metadata":{"name":"shop"}}"#, Ok(vec![])),
            ("null", r#"{"kind":"Namespace","metadata":{"name":"shop","labels":null}}"#, Ok(vec![])),
            ("another", r#"{"kind":"Namespace","metadata":{"name":"bank"}}"#, Err("it is not the Namespace")),
            (
                "another kind",
                r#"{"kind":"Status","metadata":{"name":"shop"}}"#,
                Err("it is not the Namespace"),
            ),
            ("a list", r#"[]"#, Err("it is not the Namespace")),
            ("cut", r#"{"kind":"Namesp"#, Err("EOF")),
        ] {
            match (labels(text), want) {
                (Ok(got), Ok(want)) => assert_eq!(got, want, "{case}"),
                (Err(got), Err(want)) => assert!(got.contains(want), "{case}: {got}"),
                (got, want) => panic!("{case}: {got:?}, not {want:?}"),
            }
        }
        let huge = format!(
            r#"{{"kind":"Namespace","metadata":{{"name":"shop","labels":{{"a":"{}"}}}}}}"#,
            "x".repeat(2000)
        );
        assert_eq!(read(&huge).unwrap().excess, Some(PodExcess::Text));
    }
}
