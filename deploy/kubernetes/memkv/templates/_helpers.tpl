{{- define "memkv.labels" -}}
app.kubernetes.io/name: memkv
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "memkv.selector" -}}
app.kubernetes.io/name: memkv
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "memkv.container" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
{{- end }}
